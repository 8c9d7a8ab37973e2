"""The jitted functions: training, validation and sampling of one batch.

`state.TrainState` is the training state, `objective` the loss of a batch,
`train` the training step, `evaluate` the validation steps, `sample` the
sampler.
"""
