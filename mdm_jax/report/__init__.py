"""Reports of a run: metrics, progress lines, images and goodput.

`metric_writer` and `goodput` write files through `background`; `progress` and
`console` print; `grid`, `gallery` and `sample_directory` show samples.
"""
