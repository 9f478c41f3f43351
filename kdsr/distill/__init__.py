"""What distillation adds to a restoration model: the step, its terms, tapped features, frozen networks."""
