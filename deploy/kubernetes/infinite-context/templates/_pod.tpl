{{- /* Arguments of `python -m ic serve`: dict "root" $ "version" VERSION. */}}
{{- define "ic.arguments" -}}
{{- $vllm := list }}
{{- if gt (int .version.parallel.data) 1 }}{{ $vllm = append $vllm (printf "--data-parallel-size=%d" (int .version.parallel.data)) }}{{ end }}
{{- if gt (int .version.parallel.tensor) 1 }}{{ $vllm = append $vllm (printf "--tensor-parallel-size=%d" (int .version.parallel.tensor)) }}{{ end }}
{{- $vllm = concat $vllm .version.vllmArguments }}
{{- $arguments := list (printf "source=/models/%s" .version.source) (printf "backend=%s" .version.backend) "host=0.0.0.0" "port=8000" (printf "model_name=%s" .root.Values.modelName) "token_file=/run/secrets/infinite-context/token" }}
{{- if eq .version.backend "engine" }}
{{- $arguments = concat $arguments (list (printf "accelerator=%s" .version.accelerator) (printf "limits.drain_s=%d" (int .version.drainSeconds))) }}
{{- else if $vllm }}
{{- $quoted := list }}
{{- range $vllm }}{{ $quoted = append $quoted (printf "'%s'" (replace "'" "\\'" .)) }}{{ end }}
{{- $arguments = append $arguments (printf "vllm_arguments=[%s]" (join "," $quoted)) }}
{{- end }}
{{- toYaml (concat $arguments .version.arguments) }}
{{- end }}

{{- /* Resources of a version, with its GPUs. Requests and limits of GPUs must be the same. */}}
{{- define "ic.resources" -}}
{{- $resources := deepCopy .resources }}
{{- if eq .accelerator "gpu" }}
{{- $gpus := dict .gpuResource (mul (int .parallel.data) (int .parallel.tensor) | toString) }}
{{- $resources = mergeOverwrite $resources (dict "requests" $gpus "limits" $gpus) }}
{{- end }}
{{- toYaml $resources }}
{{- end }}
