"""DUKD's zoomed views: what is cropped and shrunk, the terms from their parts, and what their gradient reaches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from basicsr.utils import matlab_functions
from skimage import data

from kdsr.data.resize import imresize
from kdsr.distill.padding import pad_and_restore
from kdsr.models.kd_model import KDModel
from kdsr.options.check import check
from kdsr.terms.dukd import random_crops, zoomed_out
from kdsr.terms.label_consistency import augment, restore

Options = dict[str, Any]
L1 = {"type": "L1Loss", "loss_weight": 0.5, "reduction": "mean"}


@pytest.fixture
def options(teacher_options: Options) -> Options:
    teacher_options["train"].update(pixel_opt=None, zoom_in_opt=dict(L1), zoom_out_opt=dict(L1))
    return teacher_options


def built(options: Options) -> KDModel:
    options = copy.deepcopy(options)
    options.update(num_gpu=0, dist=False, rank=0, world_size=1, is_train=True)
    model = KDModel(options)
    torch.manual_seed(2)
    model.feed_data({"lq": torch.rand(2, 3, 16, 16), "gt": torch.rand(2, 3, 64, 64)})
    return model


def test_crops_are_parts_of_their_images_and_are_drawn_anew():
    images = torch.arange(2 * 3 * 9 * 7, dtype=torch.float32).view(2, 3, 9, 7)
    generator = torch.Generator().manual_seed(1)
    places = set()
    for _ in range(60):
        crops = random_crops(images, 4, 5, generator)
        for image, crop in zip(images, crops, strict=True):
            y, x = divmod(int(crop[0, 0, 0] - image[0, 0, 0]), 7)
            assert torch.equal(crop, image[:, y : y + 4, x : x + 5])
            places.add((y, x))
    assert places == {(y, x) for y in range(6) for x in range(3)}  # every place, the last ones too


def test_the_whole_image_is_its_only_crop_of_that_size():
    image = torch.rand(1, 3, 6, 6)
    assert torch.equal(random_crops(image, 6, 6, torch.Generator()), image)


def test_zooming_out_drops_the_last_odd_pixels():
    assert torch.allclose(zoomed_out(torch.full((1, 3, 10, 9), 0.25), 4), torch.full((1, 3, 2, 2), 0.25))


def test_zooming_out_has_matlabs_weights_a_mirrored_border_and_no_clipping():
    image = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    image[..., 0] = 1
    # half of Keys' kernel at 0.25, 0.75, 1.25 and 1.75: the weights of the pixels at a distance of 0.5 to 3.5
    near, next_, third, far = 0.43359375, 0.11328125, -0.03515625, -0.01171875
    # pixels at 0.5 and 2.5; the mirror image of the first column lies at -1
    wanted = torch.tensor([near + next_, third + far, 0, 0], dtype=torch.float64).expand(1, 1, 4, 4)
    torch.testing.assert_close(zoomed_out(image, 2), wanted, rtol=0, atol=1e-15)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_zooming_out_is_imresize_of_the_release_and_of_our_lq_images(scale: int):
    picture = data.astronaut()[60:108, 150:198]
    image = torch.from_numpy(picture).permute(2, 0, 1).float() / 255
    small = zoomed_out(image[None], scale)[0]
    released = matlab_functions.imresize(image, 1 / scale)  # floating point, as here
    torch.testing.assert_close(small, released, rtol=0, atol=1e-6)
    rounded = torch.from_numpy(imresize(picture, 1 / scale)).permute(2, 0, 1)  # twice, to 8 bits
    assert (small * 255 - rounded).abs().max() < 1.2


def test_both_terms_are_those_of_their_parts(options: Options):
    model = built(options)
    before = copy.deepcopy(model.net_g)
    losses = model.compute_gradients(1)
    step = model.step
    plan, crops = step.kept["zoom_in_opt"], step.teacher_views["t"]["zoom_in"]
    student, teacher = before.eval(), model.net_t
    with torch.no_grad():
        seen = student(augment(crops, plan))
        wanted = 0.5 * (restore(seen, plan) - teacher(crops)).abs().mean()
        torch.testing.assert_close(losses["l_zoom_in"], wanted)
        small = zoomed_out(model.lq, 4)
        answer = student(small)
        wanted = 0.5 * ((answer - model.lq).abs().mean() + (answer - teacher(small)).abs().mean())
        torch.testing.assert_close(losses["l_zoom_out"], wanted)
    assert crops.shape == model.lq.shape
    assert set(losses) == {"l_zoom_in", "l_zoom_out"}


@pytest.mark.parametrize("key", ["zoom_in_opt", "zoom_out_opt"])
def test_the_gradient_of_each_reaches_all_of_the_student_and_no_teacher(options: Options, key: str):
    for other in {"zoom_in_opt", "zoom_out_opt"} - {key}:
        options["train"][other] = None
    model = built(options)
    model.compute_gradients(1)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.net_g.parameters())
    assert all(parameter.grad is None for parameter in model.net_t.parameters())


def test_the_half_of_zooming_out_against_x_may_have_its_own_weight(options: Options):
    options["train"].update(zoom_in_opt=None, zoom_out_gt_weight=5)
    model = built(options)
    student = copy.deepcopy(model.net_g)
    loss = model.compute_gradients(1)["l_zoom_out"]
    with torch.no_grad():
        small = zoomed_out(model.lq, 4)
        answer = student(small)
        wanted = 5 * (answer - model.lq).abs().mean() + (answer - model.net_t(small)).abs().mean()
    torch.testing.assert_close(loss, 0.5 * wanted)


def test_views_of_x_size_go_through_the_teacher_in_one_batch_with_x_first(options: Options):
    options["train"].update(logits_opt=dict(L1), lcr_opt=dict(L1))
    model = built(options)
    sizes = []
    model.net_t.register_forward_hook(lambda net, inputs, output: sizes.append(tuple(inputs[0].shape)))
    losses = model.compute_gradients(1)
    assert sizes == [(6, 3, 16, 16), (2, 3, 4, 4)]
    with torch.no_grad():
        torch.testing.assert_close(model.step.teacher_output, model.net_t(model.lq))
    assert set(losses) == {"l_ts", "l_lcr", "l_zoom_in", "l_zoom_out"}


def test_without_a_teacher_x_alone_is_the_ground_truth_of_the_smaller_image(options: Options):
    del options["network_t"], options["path"]["pretrain_network_t"]
    options["train"]["zoom_in_opt"] = None
    model = built(options)
    student = copy.deepcopy(model.net_g)
    loss = model.compute_gradients(1)["l_zoom_out"]
    with torch.no_grad():
        torch.testing.assert_close(loss, 0.5 * (student(zoomed_out(model.lq, 4)) - model.lq).abs().mean())


def test_a_network_of_windows_gets_small_images_padded(options: Options):
    options["network_g"] = {
        "type": "SwinIR", "upscale": 4, "img_size": 16, "window_size": 8, "depths": [1], "num_heads": [2],
        "embed_dim": 8, "mlp_ratio": 2, "upsampler": "pixelshuffledirect", "resi_connection": "1conv",
        "drop_path_rate": 0.0,
    }  # fmt: skip
    model = built(options)
    student = copy.deepcopy(model.net_g)
    model.compute_gradients(1)
    with torch.no_grad():  # 4×4 is no multiple of the window
        expected = pad_and_restore(student, zoomed_out(model.lq, 4), 8, 4)
    torch.testing.assert_close(model.step.results["zoom_out"], expected)


def test_the_teachers_windows_are_looked_for_once_and_not_at_each_step(
    options: Options, monkeypatch: pytest.MonkeyPatch
):
    model = built(options)
    searched = []
    modules = type(model.net_t).modules
    monkeypatch.setattr(
        type(model.net_t), "modules", lambda net, *rest: searched.append(net) or modules(net, *rest)
    )
    for step in (1, 2, 3):
        model.compute_gradients(step)
    assert sum(net is model.net_t for net in searched) == 0


def test_bad_options_are_refused(options: Options):
    options["train"]["logits_opt"] = None
    del options["network_t"], options["path"]["pretrain_network_t"]
    problems = check(options, is_train=True)
    assert problems == ["train.zoom_in_opt: needs a teacher; give network_t and path.pretrain_network_t"]
    options["train"]["zoom_in_opt"] = None
    options.update(scale=1)
    assert any(
        "train.zoom_out_opt: downsamples x by the scale, which is 1" in problem
        for problem in check(options, True)
    )
    options.update(scale=4)
    options["datasets"]["train"]["gt_size"] = 12
    assert any("LQ patches of 3 pixels are too small" in problem for problem in check(options, True))
