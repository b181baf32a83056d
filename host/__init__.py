"""The embedded node editor: serves comfyui-frontend-package and runs graphs, for a single local user.

  serve.py         the command `python3 run.py [serve]`
  render.py        the command `python3 run.py render`: a workflow file without the editor
  arguments.py     command-line options that both share; terminal.py: text for the terminal
  server.py        the web application: page, WebSocket, and the routes of the next three
  queue_routes.py  prompts, queue, history and jobs
  info_routes.py   node definitions, templates, the log and the system
  file_routes.py   images, uploads, saved workflows and settings
  guard.py         refuses requests from other sites and under foreign names; sets security headers
  connections.py   HTTP connections with time limits
  request_reading.py  request bodies within limits, checks of their fields, errors in one sentence
  json_writer.py   valid JSON of any value
  sockets.py       WebSocket messages, previews, the Console panel
  jobs.py          the queue, its worker thread and the history
  validation.py    checks a prompt before anything runs
  prompt_graph.py  a prompt's wires, and the order in which it runs
  execution.py     runs a prompt: order, result cache, progress, interruption
  run_events.py    the events of a run, as the editor receives them
  context.py       what a running node can call: progress, preview, notice
  registry.py      the node classes and their `object_info`
  stock_nodes.py   LoadImage, SaveImage, PreviewImage, PreviewAny
  files.py         folders, path checks, atomic writes
  unfinished.py    hidden files of writes in progress, locks between programs
  json_reader.py   JSON from outside, with limits
  workflow.py      workflow files in, prompts out
  graph.py         the editor's graph to a prompt, as its Run button does
  saved_graph.py   nodes, links and widget values of a saved graph
  promoted.py      widgets that a subgraph's node shows
  placeholders.py  dates and widget values in file name prefixes

Other node packs, list inputs, lazy inputs and several users need ComfyUI itself.
"""
