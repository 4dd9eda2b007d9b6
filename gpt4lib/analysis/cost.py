"""Money, from device hours and a price."""

from __future__ import annotations


def device_hours(n_devices: int, seconds: float) -> float:
    return n_devices * seconds / 3600


def dollars(n_devices: int, seconds: float, dollars_per_device_hour: float) -> float:
    """Renting n_devices for `seconds`."""
    return device_hours(n_devices, seconds) * dollars_per_device_hour


def tokens_per_second(n_devices: int, dollars_per_device_hour: float, dollars_per_token: float) -> float:
    """The throughput that a price per token implies for a rented cluster."""
    return n_devices * dollars_per_device_hour / 3600 / dollars_per_token
