"""What a person looks at: a conversation, a dataset, pictures and pages of them."""
