"""Typed params: one frozen model per block of params.yaml, by subject.

Every block refuses unknown keys (naming the nearest known one) and values out of range, so that a
mistake costs a second and not a night. What a method may be given stands in the method's own file.
"""
