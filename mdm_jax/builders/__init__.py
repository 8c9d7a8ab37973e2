"""Builds models, stages and data sets from a configuration.

`stage.make_stage` describes a stage once: model, objective, optimizer, sizes.
`check` finds mistakes, `config` reads and compares configurations, and
`recipes` finds recipes by name. `model`, `text`, `data` and `prompts` build the
parts. The packages that this one imports never see a ConfigDict.
"""
