"""Does training on the exact contexts of inference make a better model?"""
