"""Diffusion on a pyramid of images: the maths, and no network.

`schedule` (gammas of every level), `process` (forward process and conversions
between v, eps and x0), `pyramid` (images at every resolution), `loss`
(`multi_resolution_loss`), `guidance` (classifier-free guidance and
autoguidance) and `samplers` (`sample`). Loss and samplers take a `denoise_fn`,
see `process.DenoiseFn`.
"""
