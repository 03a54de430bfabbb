"""Philox over Python's unbounded integers, one block at a time: nothing in it can overflow, wrap or be vectorised."""

import struct

import torch


def oracle_philox(key, counter):
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 % 2**32, (product0 >> 32) ^ c3 ^ k1, product0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def oracle_block(pair, data=0, domain=0):
    seed, offset = pair
    position = (offset + data) % 2**64
    return oracle_philox((seed % 2**32, seed >> 32), (position % 2**32, position >> 32, domain, 0))


def oracle_words(pair, count):
    return [oracle_block(pair, j // 4)[j % 4] for j in range(count)]


def oracle_fold_in(pair, data):
    """Integers fold in domain 0; names in domain 1, by their 64-bit FNV-1a hash."""
    domain = 0
    if isinstance(data, str):
        domain, name, data = 1, data, 14695981039346656037
        for byte in name.encode():
            data = (data ^ byte) * 1099511628211 % 2**64
    r0, r1, r2, r3 = oracle_block(pair, data, domain)
    return r0 | r1 << 32, r2 | r3 << 32


def signed(number):
    return struct.unpack("<q", struct.pack("<Q", number % 2**64))[0]


def key_of(*pairs):
    """The key of a pair of integers; of several pairs, a batch of keys."""
    rows = torch.tensor([[signed(seed), signed(offset)] for seed, offset in pairs])
    return rows if len(pairs) > 1 else rows[0]


def pair_of(key):
    seed, offset = key.tolist()
    return seed % 2**64, offset % 2**64
