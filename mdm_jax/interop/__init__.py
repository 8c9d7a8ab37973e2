"""Reads and writes other projects' files, without their code.

`hugging_face` reads model directories, `torch_checkpoint` reads and writes
PyTorch checkpoints, and `ml_mdm` names parameters as Apple's `ml-mdm` does.
"""
