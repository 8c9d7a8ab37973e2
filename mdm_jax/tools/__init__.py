"""Commands beside training and sampling: `python -m mdm_jax.tools.NAME`.

Data: `prepare_data`, `index_tars`, `precompute_text`, `train_tokenizer`.
Weights: `import_ml_mdm`, `export_weights`. Speed and memory: `plan`, `bench`,
`bench_data`. Samplers: `compare_samplers`. Tuning: `sweep`. Recipes at equal
compute: `compare_models`. `--help` explains the flags; tests and other tools
may import the functions.

Nine modules are no commands. `compile_ahead` compiles steps for TPUs
and GPUs that are not there, and `hlo` counts the bytes that a program moves.
`conversion`, `tfds_writer` and `worker_pool` do the work of `prepare_data`,
`sweep_training`, `run_commands` and `sweep_evaluation` that of `sweep`,
`recipe_costs` that of `compare_models`.
"""
