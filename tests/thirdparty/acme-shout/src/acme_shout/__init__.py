"""Shouts texts."""
