"""Commands beside training and sampling."""
