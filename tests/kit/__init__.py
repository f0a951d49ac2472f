"""What the tests stand on: simulators, a proxy, shims, servers, boxes; and the tests of those."""
