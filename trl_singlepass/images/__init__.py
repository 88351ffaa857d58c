"""Images: their pixels, what a processor writes for them into a prompt, and how a model reads them on a tree."""
