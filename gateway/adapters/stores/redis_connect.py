"""What talks to a Redis, made as its topology asks for."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from functools import partial

from gateway.adapters.stores.redis_cluster import RedisCluster
from gateway.adapters.stores.redis_connection import RedisConnection
from gateway.adapters.stores.redis_keys import load_library
from gateway.adapters.stores.redis_link import make_connection
from gateway.adapters.stores.redis_location import RedisAddress, RedisLocation, Topology
from gateway.adapters.stores.redis_one_master import OneMaster
from gateway.adapters.stores.redis_preparation import Preparation
from gateway.adapters.stores.redis_sentinel import RedisSentinels
from gateway.ports import Telemetry


def connect(
    location: RedisLocation, *, full_sync: bool, new_token: Callable[[], str], telemetry: Telemetry
) -> RedisConnection:
    """What talks to the Redis at ``location``, not yet connected; see ``running_connection``."""
    tls = ssl.create_default_context() if location.tls else None
    make = partial(
        make_connection,
        database=location.database,
        username=location.username,
        password=location.password,
        tls=tls,
    )
    preparation = Preparation(load_library(), location.topology, full_sync)
    if location.topology is Topology.CLUSTER:
        return RedisCluster(
            seeds=location.addresses,
            make=make,
            preparation=preparation,
            new_token=new_token,
            telemetry=telemetry,
        )
    master: RedisSentinels | RedisAddress = location.addresses[0]
    if location.topology is Topology.SENTINEL:
        make_sentinel = partial(
            make_connection, username=location.sentinel_username, password=location.sentinel_password, tls=tls
        )
        master = RedisSentinels(location.addresses, location.service, make_sentinel)
    return OneMaster(
        master=master, make=make, preparation=preparation, new_token=new_token, telemetry=telemetry
    )
