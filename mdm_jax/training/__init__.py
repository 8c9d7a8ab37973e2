"""Training: the loop over steps and stages, and what happens beside it.

`loop.train` is the entry. `initial_state` restores or grows a state, `monitor`
reads metrics back, `hooks` are the periodic reports, `stage_checkpoints` is
what is saved, `grow` turns one stage's network into the next one's, and `run`
is what all stages share.
"""
