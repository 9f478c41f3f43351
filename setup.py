"""Metadata of kdsr. Installing basicsr needs a hand: see README.md, or let the Makefile do it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """The version that kdsr/__init__.py states, read without importing it (that would import torch)."""
    found = re.search(
        r'^__version__ = "(.+)"$', (ROOT / "kdsr/__init__.py").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert found, "kdsr/__init__.py states no __version__"
    return found.group(1)


setup(
    name="kdsr",
    version=version(),
    description="Knowledge distillation for image restoration, inside BasicSR",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="kdsr authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["kdsr", "kdsr.*"]),
    package_data={"kdsr": ["py.typed", "*/*.yml"]},
    python_requires=">=3.11,<3.13",  # basicsr 1.4.2 does not install on 3.13
    install_requires=[
        "basicsr==1.4.2",
        "lmdb",
        "matplotlib",
        "numpy>=2.0",
        "pandas",
        "pillow",
        "pyyaml",
        "requests",
        "safetensors",
        "scikit-image>=0.26",
        "scipy",
        "spandrel>=0.4.2",
        "torch>=2.6",
        "torchvision",
        "tqdm",
        "typer",
    ],
    extras_require={"export": ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5", "onnxslim>=0.1.50"]},
    entry_points={"console_scripts": ["kdsr = kdsr.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Image Processing",
    ],
)
