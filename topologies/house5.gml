# A square with a roof: five workers of unequal speed on links of unequal quality.
# Source: made by hand for this project, as an example of every attribute and as a test.
# Nothing is measured; latency_ms, bandwidth_gbps and compute_scale are assumed, chosen so that the
# slowest worker (roof, half as fast) is not the one with the slowest link (floor).
# x, y: where the nodes stand in a picture.
graph [
  node [ id 0 label "bottom left"  compute_scale 1.0 x 0.0 y 0.0 ]
  node [ id 1 label "bottom right" compute_scale 1.0 x 1.0 y 0.0 ]
  node [ id 2 label "top right"    compute_scale 1.2 x 1.0 y 1.0 ]
  node [ id 3 label "top left"     compute_scale 0.8 x 0.0 y 1.0 ]
  node [ id 4 label "roof"         compute_scale 2.0 x 0.5 y 1.6 ]
  edge [ source 0 target 1 latency_ms 20.0 bandwidth_gbps 1.0 ]   # floor
  edge [ source 1 target 2 latency_ms 1.0  bandwidth_gbps 10.0 ]
  edge [ source 2 target 3 latency_ms 0.5  bandwidth_gbps 25.0 ]  # ceiling
  edge [ source 3 target 0 latency_ms 1.0  bandwidth_gbps 10.0 ]
  edge [ source 2 target 4 latency_ms 5.0  bandwidth_gbps 2.5 ]
  edge [ source 3 target 4 latency_ms 5.0  bandwidth_gbps 2.5 ]
]
