from decentral.cli import main

main()
