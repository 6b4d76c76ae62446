"""Parquet modular encryption, as pyarrow does it: data keys of each file wrapped by a master key of `keys`.

Footer and pages are encrypted (AES-GCM), and each part is authenticated with its place in its file. The wrapped keys
lie in the file. pyarrow's properties cannot be pickled with their keys, so whoever reads makes them for himself.
"""

from functools import lru_cache
from typing import Any

import pyarrow.parquet.encryption as pe

from elastrain.keys import key_service

ALGORITHM = "AES_GCM_V1"  # the other one, AES_GCM_CTR_V1, would leave the pages without a tag


class _Client(pe.KmsClient):  # type: ignore[misc] # pyarrow has no types
    """The key service as pyarrow calls it."""

    def __init__(self, config: pe.KmsConnectionConfig) -> None:
        super().__init__()
        del config

    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> str:
        return key_service().wrap(key_bytes, master_key_identifier)

    def unwrap_key(self, wrapped_key: str, master_key_identifier: str) -> bytes:
        return key_service().unwrap(wrapped_key, master_key_identifier)


def encryption_of(name: str) -> Any:
    """Return what a ParquetWriter needs to encrypt one file under the key `name`; raises StorageError without it."""
    config = pe.EncryptionConfiguration(
        footer_key=name,
        uniform_encryption=True,
        encryption_algorithm=ALGORITHM,
        plaintext_footer=False,
        double_wrapping=True,
        internal_key_material=True,
    )
    return _factory().file_encryption_properties(pe.KmsConnectionConfig(), config)


def decryption() -> Any:
    """Return what reads one encrypted file; reading raises StorageError if its key is not there or another one."""
    return _factory().file_decryption_properties(pe.KmsConnectionConfig())


@lru_cache(maxsize=1)
def _factory() -> pe.CryptoFactory:
    """Keep one for the process: it remembers unwrapped keys for ten minutes, so that a key service is rarely asked."""
    return pe.CryptoFactory(_Client)
