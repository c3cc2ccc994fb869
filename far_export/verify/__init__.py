"""Verification: a bundle's engines against its checkpoint's torch modules."""
