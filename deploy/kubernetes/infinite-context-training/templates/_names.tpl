{{- define "ic.name" -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "ic.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "ic.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "ic.image" -}}
{{- with .Values.image }}
{{- if .digest }}{{ printf "%s@%s" .repository .digest }}
{{- else }}{{ printf "%s:%s" .repository (.tag | default $.Chart.AppVersion) }}{{ end }}
{{- end }}
{{- end }}

{{- /* Where the ranks meet: the pod of index 0, by the name that its headless Service gives it. */}}
{{- define "ic.master" -}}
{{- if eq .Values.kind "JobSet" }}{{ include "ic.name" . }}-node-0-0.{{ include "ic.name" . }}
{{- else }}{{ include "ic.name" . }}-0.{{ include "ic.name" . }}{{ end }}
{{- end }}

{{- /* What values.schema.json cannot say. */}}
{{- define "ic.check" -}}
{{- if not .Values.volumes.runs.claim }}{{ fail "volumes.runs.claim is empty: name the PersistentVolumeClaim that takes the checkpoints; without one a restarted job would begin anew" }}{{ end }}
{{- if not .Values.overrides }}{{ fail "overrides is empty: say what to train, such as --set overrides={experiment=mla_32k}" }}{{ end }}
{{- if and (eq .Values.kind "Job") (gt (int .Values.nodes) 1) }}{{ fail (printf "kind=Job with nodes=%d: a Job does not start its pods anew together, and those that ended well not at all, so the ranks would wait for each other; choose kind JobSet" (int .Values.nodes)) }}{{ end }}
{{- range .Values.overrides }}
{{- $key := splitList "=" . | first }}
{{- if has $key (list "run_id" "ckpt_path" "output_dir" "trainer.num_nodes" "trainer.devices" "trainer.accelerator") }}{{ fail (printf "overrides: %s is given by the chart; set runId, nodes, gpusPerNode or volumes.runs instead" $key) }}{{ end }}
{{- end }}
{{- end }}
