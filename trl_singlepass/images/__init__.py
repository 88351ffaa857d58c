"""
Images: where their pixels are, what a processor writes for them into a prompt, and how a model reads them on a tree.

Nothing here imports Pillow or torch before the first image is read: datasets of text need neither.
"""
