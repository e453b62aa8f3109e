# Abilene, the backbone of the Internet2 project across the United States, as of early 2005:
# 11 routers, 14 links. A wide-area network to train across, one worker a city.
#
# Who is linked to whom: public, as in the network's published maps; also listed in the Internet
# Topology Zoo (http://www.topology-zoo.org, "Abilene", February 2005).
# lat, lon: degrees, of the city (public), not of the building.
# latency_ms: computed, not measured. One way, great-circle distance between the cities (sphere of
#   radius 6371 km) at 2/3 of the speed of light in vacuum. Real fibre is longer: expect more.
# bandwidth_gbps: nominal, OC-192 (10 Gbit/s) on every link, as the Topology Zoo lists it. (SNDlib's
#   Abilene gives Atlanta -- Indianapolis a quarter of that.) Assumed free of other traffic and the
#   same in both directions.
# No compute_scale: every worker computes at the same speed.
graph [
  directed 0
  node [ id 0  label "Seattle"      lat 47.61 lon -122.33 ]
  node [ id 1  label "Sunnyvale"    lat 37.37 lon -122.04 ]
  node [ id 2  label "Los Angeles"  lat 34.05 lon -118.24 ]
  node [ id 3  label "Denver"       lat 39.74 lon -104.99 ]
  node [ id 4  label "Kansas City"  lat 39.10 lon -94.58 ]
  node [ id 5  label "Houston"      lat 29.76 lon -95.37 ]
  node [ id 6  label "Chicago"      lat 41.88 lon -87.63 ]
  node [ id 7  label "Indianapolis" lat 39.77 lon -86.16 ]
  node [ id 8  label "Atlanta"      lat 33.75 lon -84.39 ]
  node [ id 9  label "Washington"   lat 38.91 lon -77.04 ]
  node [ id 10 label "New York"     lat 40.71 lon -74.01 ]
  edge [ source 0  target 1  latency_ms 5.70  bandwidth_gbps 10.0 ]
  edge [ source 0  target 3  latency_ms 8.21  bandwidth_gbps 10.0 ]
  edge [ source 1  target 2  latency_ms 2.52  bandwidth_gbps 10.0 ]
  edge [ source 1  target 3  latency_ms 7.52  bandwidth_gbps 10.0 ]
  edge [ source 2  target 5  latency_ms 11.04 bandwidth_gbps 10.0 ]
  edge [ source 3  target 4  latency_ms 4.49  bandwidth_gbps 10.0 ]
  edge [ source 4  target 5  latency_ms 5.21  bandwidth_gbps 10.0 ]
  edge [ source 4  target 7  latency_ms 3.64  bandwidth_gbps 10.0 ]
  edge [ source 5  target 8  latency_ms 5.64  bandwidth_gbps 10.0 ]
  edge [ source 6  target 7  latency_ms 1.33  bandwidth_gbps 10.0 ]
  edge [ source 6  target 10 latency_ms 5.72  bandwidth_gbps 10.0 ]
  edge [ source 7  target 8  latency_ms 3.44  bandwidth_gbps 10.0 ]
  edge [ source 8  target 9  latency_ms 4.37  bandwidth_gbps 10.0 ]
  edge [ source 10 target 9  latency_ms 1.64  bandwidth_gbps 10.0 ]
]
