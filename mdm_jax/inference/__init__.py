"""Using a trained model: opening a run, sampling from it, measuring it.

`session.open_run` opens a run, for every command alike; `weights` finds its EMA
weights. `validation` is what training measures, `evaluation` what the evaluate
command does, with `references` (the cache for FID) and `feature_extractors`.
`run_flags` are the flags that the commands share.
"""
