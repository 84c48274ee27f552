"""The embedded world: drawings, the scenes and signs made of them, and what is known of each."""
