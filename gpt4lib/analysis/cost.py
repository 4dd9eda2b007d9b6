"""Money, from device hours and a price. Every argument may be an array."""

from __future__ import annotations


def device_hours(n_devices, seconds):
    """Hours of one device: what clouds bill."""
    return n_devices * seconds / 3600


def dollars(n_devices, seconds, dollars_per_device_hour):
    """Renting n_devices for `seconds`."""
    return device_hours(n_devices, seconds) * dollars_per_device_hour


def dollars_per_1k_tokens(n_devices, dollars_per_device_hour, tokens_per_second):
    """What a thousand tokens cost on a rented cluster that sustains this rate."""
    return 1000 * dollars(n_devices, 1, dollars_per_device_hour) / tokens_per_second


def tokens_per_second(n_devices, dollars_per_device_hour, dollars_per_token):
    """The throughput that a price per token implies for a rented cluster."""
    return dollars(n_devices, 1, dollars_per_device_hour) / dollars_per_token
