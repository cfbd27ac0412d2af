"""Promotion: a registered policy becomes the champion when every gate lets it pass, and the evidence stays with it."""
