"""Checkpoints of any pytree, which survive kills, full disks and bit flips.

`manager.Checkpoints` saves while training continues; `saved_steps` finds the
steps that exist and are undamaged, by the file hashes of `manifest`; `restore`
reads a state or a part of it.
"""
