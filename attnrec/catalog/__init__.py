"""Catalogues that are searched while they change."""

from attnrec.catalog.file import CatalogFileError
from attnrec.catalog.packed import Catalog

__all__ = ["Catalog", "CatalogFileError"]
