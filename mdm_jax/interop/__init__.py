"""Reads and writes other projects' files, without their code.

`hugging_face` finds and opens weights, `torch_checkpoint` reads and writes
PyTorch checkpoints, `file_types` recognises files, and `ml_mdm` names
parameters as Apple's `ml-mdm` does.
"""
