"""Metrics of generated images, and the networks that they need.

Metrics: `fid` (FID, KID, precision and recall, from features),
`prompt_accuracy` (attributes of shapes that prompts ask for), `motion` (the
same of clips), `edge_width` (how blurred the outlines of objects are) and
`clip` (CLIPScore). Networks: `inception`, `classifier` (for shapes) and `clip`,
with its `clip_tokenizer`.
"""
