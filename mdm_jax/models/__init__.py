"""Networks: the NestedUNet and its text encoders.

`matryoshka.Matryoshka` is the whole model. It holds a `nested_unet.NestedUNet`
of one `unet.UNet` per level, the innermost of which may be a
`transformer.Transformer`, and a text encoder from `conditioning` (trained with
the network) or `t5` (frozen). `layers` are the building blocks, `packing` lays
features out for TPUs, and `initialize` makes the initial parameters.
"""
