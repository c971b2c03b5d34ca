"""The store of a process group listens where it was told to, and nowhere else."""

import psutil

from c2f_ray.runtime.rendezvous import open_store


def test_on_loopback_alone():
    store = open_store("127.0.0.1")
    listening = [each.laddr for each in psutil.Process().net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if address.port == store.port] == ["127.0.0.1"]
    store.set("key", "value")
    assert store.get("key") == b"value"
