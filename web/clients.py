"""Tell the clients of the server apart, by address and key."""

from contextlib import suppress
from ipaddress import IPv6Address, ip_address, ip_network
from typing import NamedTuple


class Client(NamedTuple):
    """A client: an address and a key. All clients at an address share the limits of that address."""

    address: str = ""
    key: str = ""

    @classmethod
    def at(cls, address: str | None, key: str = "") -> "Client":
        """Return the client of a connection. IPv6 addresses become their /64 network, which belongs to one machine."""
        with suppress(ValueError):
            if isinstance(place := ip_address(address or ""), IPv6Address) and not place.ipv4_mapped:
                address = str(ip_network((place, 64), strict=False))
        return cls(address or "", key[:200])


NOBODY = Client()
