"""HTTP serving on Ray Serve. The modules in the order in which a chat request passes through them:

proxy       errors of Serve's own HTTP proxy in OpenAI's form
auth        API key, slots and body size, before the body is parsed (admission counts the slots)
bodies      JSON, parsed strictly and with limits
protocol    schemas of requests and answers
routes      one function per route
requests    the server's limits on text, sampling and images; the Pipeline's input
router      choice of champion or challenger, retry after a replica's death
replica     the Pipeline, in its own deployment (models resolves and deploys it)

rollout     background work of a gateway: shares, roll-back, promotion, moved aliases
canary      statistics of the comparison of champion and challenger
probes      questions with known answers that both are asked
registrar   actor for MLflow, lineage and deployments
metrics     GET /metrics
playground  page of the chat app, and its votes

options     arguments of an app and limits of a request
app         the Serve applications, built from the options
gateway     ingress deployment of an app, without weights (readiness answers /health)
launch      start and stop of `bridgework serve`
errors      APIError and the conversion of other exceptions
"""
