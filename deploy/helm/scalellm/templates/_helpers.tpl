{{- define "scalellm.name" -}}
{{- .Values.fullnameOverride | default (ternary .Release.Name (printf "%s-scalellm" .Release.Name) (contains "scalellm" .Release.Name)) | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* The objects of one model: its id, or its name made fit for one. */}}
{{- define "scalellm.modelId" -}}
{{- if .id }}{{ .id }}{{ else -}}
{{- $short := regexReplaceAll "[^a-z0-9]+" (lower (last (splitList "/" .name))) "-" | trunc 20 | trimAll "-" -}}
{{- if not (regexMatch "^[a-z]" $short) }}{{ fail (printf "models: %q makes no name for Kubernetes; give it an id" .name) }}{{ end -}}
{{ $short }}
{{- end -}}
{{- end -}}

{{- define "scalellm.engineName" -}}
{{ include "scalellm.name" .root }}-{{ include "scalellm.modelId" .model }}
{{- end -}}

{{/* "true" for a model whose pods are whole deployments, each with a shape of its own: `scalellm serve`. */}}
{{- define "scalellm.isShaped" -}}
{{- if or (eq (.blueprint | default "static") "auto") .shapes }}true{{ end -}}
{{- end -}}

{{- define "scalellm.portName" -}}
{{ if include "scalellm.isShaped" . }}http{{ else }}grpc{{ end }}
{{- end -}}

{{/* How many engines of a model there may ever be: the gateway knows all their names. */}}
{{- define "scalellm.mostReplicas" -}}
{{- $scaling := .autoscaling | default dict -}}
{{- if $scaling.enabled }}{{ max (int ($scaling.maxReplicas | default 4)) (int ($scaling.minReplicas | default 1)) }}{{ else }}{{ max 1 (int (.replicas | default 1)) }}{{ end -}}
{{- end -}}

{{- define "scalellm.selector" -}}
app.kubernetes.io/name: scalellm
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "scalellm.labels" -}}
{{ include "scalellm.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "scalellm.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{- define "scalellm.secretName" -}}
{{ .Values.secrets.existingSecret | default (include "scalellm.name" .) }}
{{- end -}}

{{- define "scalellm.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "scalellm.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "scalellm.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* HF_TOKEN: only where the Secret has it. */}}
{{- define "scalellm.hubToken" -}}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ include "scalellm.secretName" . }}, key: HF_TOKEN, optional: true}
{{- end -}}
