"""The demo: a web page that samples images for its users.

`queue` runs requests one by one, `page` is the page in Gradio, `html` renders
its cards and status lines, and `access` decides who may see it.
"""
