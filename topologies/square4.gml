# The smallest graph worth a file: four workers in a square, nothing but nodes and edges.
# Source: made by hand for this project, as an example and a test. Nothing is measured; without
# latency_ms and bandwidth_gbps the network section of the config holds for every link.
graph [
  node [ id 0 label "a" ]
  node [ id 1 label "b" ]
  node [ id 2 label "c" ]
  node [ id 3 label "d" ]
  edge [ source 0 target 1 ]
  edge [ source 1 target 2 ]
  edge [ source 2 target 3 ]
  edge [ source 3 target 0 ]
]
