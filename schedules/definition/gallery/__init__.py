"""Definitions to copy, a kind of attention in a few lines each: ``build --definition documents.py:documents``.

``docs/definitions.md`` has them all with their pictures.  No kernel of the package is made from these.
"""
