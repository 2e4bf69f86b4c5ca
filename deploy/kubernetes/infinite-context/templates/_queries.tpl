{{- /*
PromQL over the pods of one version: dict "root" $ "version" NAME "backend" vllm|engine.

A pod has one series for each data-parallel rank, with the label `engine`. The labels `namespace` and
`pod` come from Prometheus, `release` and `version` from our ServiceMonitor. `max by` takes a series
once that two scrapes have found.
*/}}
{{- define "ic.series" -}}
{{- $prefix := eq .backend "vllm" | ternary "vllm" "ic" -}}
max by (pod, engine) ({{ $prefix }}:{{ .metric }}{namespace="{{ .root.Release.Namespace }}",release="{{ .root.Release.Name }}",version="{{ .version }}"})
{{- end }}

{{- /* Requests of all pods and ranks, in the batch or waiting for it. */}}
{{- define "ic.requests" -}}
sum({{ include "ic.series" (merge (dict "metric" "num_requests_running") .) }}) + sum({{ include "ic.series" (merge (dict "metric" "num_requests_waiting") .) }})
{{- end }}

{{- /* Full caches: the mean over a pod's ranks, summed over pods. Two pods at one half make one. */}}
{{- define "ic.caches" -}}
sum(avg by (pod) ({{ include "ic.series" (merge (dict "metric" "kv_cache_usage_perc") .) }}))
{{- end }}
