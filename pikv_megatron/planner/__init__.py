"""What a cache would take, before any rank is started: python -m pikv_megatron.planner --help"""
