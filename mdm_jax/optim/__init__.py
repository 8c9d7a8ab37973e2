"""Optimizers, EMAs of parameters, and the rule for skipped steps.

`optimizer` makes AdamW or Muon, `ema` updates the decaying EMA, `post_hoc_ema`
the EMAs whose sigma_rel is chosen after training, and `skip_step` decides which
steps are skipped.
"""
