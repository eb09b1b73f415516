"""Kinds of trunks: each a module here, named in params.yaml as ``trunk: {<module>: <options>}``.

A module has ``options(given, where)``, which checks what params.yaml says, and ``build(options, norm)``,
which makes the :class:`ucir.models.trunk.Trunk`. A new kind is a new file and nothing else.
"""
