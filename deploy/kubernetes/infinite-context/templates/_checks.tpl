{{- /* What values.schema.json cannot say. Fails with one line, before anything is rendered. */}}
{{- define "ic.check" -}}
{{- if not .Values.modelName }}{{ fail "modelName is empty: give the name by which clients ask for the model" }}{{ end }}
{{- if not .Values.token.secret }}{{ fail "token.secret is empty: the server listens to other machines and takes no request without a token; make a secret (kubectl create secret generic ic-token --from-literal=token=$(openssl rand -hex 32)) and give its name" }}{{ end }}
{{- if not .Values.versions }}{{ fail "versions is empty: give at least one, such as --set versions.stable.source=mla_1b --set versions.stable.weight=100" }}{{ end }}
{{- if and .Values.gateway.enabled (not .Values.gateway.parents) }}{{ fail "gateway.enabled=true needs gateway.parents: name the Gateway that takes the requests" }}{{ end }}
{{- if and .Values.inferencePool.enabled (not .Values.gateway.enabled) }}{{ fail "inferencePool.enabled=true needs gateway.enabled=true: requests reach a pool through an HTTPRoute" }}{{ end }}
{{- $sum := 0 }}
{{- range $name, $_ := .Values.versions }}
{{- $version := include "ic.version" (dict "root" $ "version" $name) | fromJson }}
{{- $sum = add $sum (int $version.weight) }}
{{- include "ic.check.version" (dict "root" $ "name" $name "version" $version) }}
{{- end }}
{{- if ne (int $sum) 100 }}
{{- $weights := list }}
{{- range $name, $version := .Values.versions }}{{ $weights = append $weights (printf "%s=%d" $name (int $version.weight)) }}{{ end }}
{{- fail (printf "the weights of versions sum to %d (%s): they are shares in percent and must sum to 100" (int $sum) (join ", " $weights)) }}
{{- end }}
{{- end }}

{{- define "ic.check.version" -}}
{{- $where := printf "versions.%s" .name }}
{{- with .version }}
{{- if not .source }}{{ fail (printf "%s.source is empty: give the model's folder or file below /models" $where) }}{{ end }}
{{- if has ".." (splitList "/" .source) }}{{ fail (printf "%s.source=%s leaves the volume: give a path below /models" $where .source) }}{{ end }}
{{- if and (eq .backend "engine") (gt (mul .parallel.data .parallel.tensor) 1) }}{{ fail (printf "%s: backend engine runs on one GPU, and parallel asks for data=%v x tensor=%v; choose backend vllm, or replicas" $where .parallel.data .parallel.tensor) }}{{ end }}
{{- if and (eq .backend "engine") .vllmArguments }}{{ fail (printf "%s.vllmArguments are for backend vllm; give backend engine its own in arguments" $where) }}{{ end }}
{{- if and (eq .backend "engine") $.root.Values.inferencePool.enabled }}{{ fail (printf "%s: llm-d's endpoint picker reads vLLM's metrics; with inferencePool choose backend vllm" $where) }}{{ end }}
{{- $volume := .volume }}
{{- if and (eq $volume.from "claim") (not $volume.claim) }}{{ fail (printf "%s.volume.claim is empty: name the PersistentVolumeClaim that holds the model, or choose another volume.from" $where) }}{{ end }}
{{- if and (eq $volume.from "node") (not (and (hasPrefix "/" $volume.node.path) $volume.node.names)) }}{{ fail (printf "%s.volume.node needs path (absolute) and names (of nodes that have it)" $where) }}{{ end }}
{{- if and (eq $volume.from "download") (not (and $volume.download.url $volume.download.sha256)) }}{{ fail (printf "%s.volume.download needs url and sha256: an archive is only used if its digest is the one that was meant" $where) }}{{ end }}
{{- $scaling := .autoscaling }}
{{- if gt (int $scaling.minReplicas) (int $scaling.maxReplicas) }}{{ fail (printf "%s.autoscaling: minReplicas=%v is above maxReplicas=%v" $where $scaling.minReplicas $scaling.maxReplicas) }}{{ end }}
{{- if and (eq $scaling.scaler "keda") (not $scaling.prometheus.address) }}{{ fail (printf "%s.autoscaling.prometheus.address is empty: KEDA asks Prometheus for the queue; give its address" $where) }}{{ end }}
{{- if eq (int $scaling.minReplicas) 0 }}
{{- if ne $scaling.scaler "keda" }}{{ fail (printf "%s.autoscaling.minReplicas=0 needs scaler keda: scaler %s does not go to zero" $where $scaling.scaler) }}{{ end }}
{{- if eq $scaling.wake.by "none" }}{{ fail (printf "%s.autoscaling.minReplicas=0 needs wake.by http-addon or query: with no pod there is no metric, and nothing would start one" $where) }}{{ end }}
{{- if and (eq $scaling.wake.by "query") (not $scaling.wake.query) }}{{ fail (printf "%s.autoscaling.wake.query is empty: give PromQL over what stands before the pods, such as the gateway or the router" $where) }}{{ end }}
{{- if and (eq $scaling.wake.by "http-addon") (not (and $.root.Values.gateway.enabled $.root.Values.gateway.hostnames)) }}{{ fail (printf "%s.autoscaling.wake.by=http-addon needs gateway.enabled=true and gateway.hostnames: the route leads to the add-on's interceptor, which knows requests by host" $where) }}{{ end }}
{{- if and (eq $scaling.wake.by "http-addon") $.root.Values.inferencePool.enabled }}{{ fail (printf "%s: the HTTP add-on and inferencePool both stand between gateway and pods; choose one" $where) }}{{ end }}
{{- end }}
{{- end }}
{{- end }}
