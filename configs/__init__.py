"""Recipes: each module's `get_config` returns a runnable configuration.

`common` has every key with its default and unit.
"""
