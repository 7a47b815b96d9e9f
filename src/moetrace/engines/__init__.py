"""Engines that generate and record: one small contract (`base`), one implementation a folder."""
