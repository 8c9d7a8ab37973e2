"""Data sources, transforms and the input pipeline.

A source gives random access to records (`pipeline.Source`), a transform turns
a record into an example (`transforms.Transform`), and `pipeline.make_dataset`
batches examples in an order that depends on the seed alone.

Sources: `shapes` (procedural), `sources` (written by tools.prepare_data),
`tar_index` (tars read in place) and `tfds_source` (TensorFlow Datasets).
Text: `captions` (checks what comes in), `text` (tokenizer), `labels` (classes),
`precomputed` (text features).
`inputs` finds the captioned images that prepare_data converts: in `tars`, whose
members `tar_members` reads, in `folders` with `tables`, and in `parquet` files.
"""
