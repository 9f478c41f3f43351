"""Making data sets: bicubic pairs, sub-images, synthetic rain, blur, haze and noise, the sample."""
