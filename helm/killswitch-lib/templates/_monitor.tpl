{{/* Scrapes the guarded pods of this release. A PodMonitor finds the port of a native sidecar, a Service may not. */}}
{{- define "killswitch.podMonitor" -}}
{{- $v := .Values.killswitch -}}
{{- if and $v.enabled (include "killswitch.monitoringWanted" (list . $v.podMonitor.enabled)) }}
---
apiVersion: monitoring.coreos.com/v1
kind: PodMonitor
metadata:
  name: {{ include "killswitch.fullname" . }}
  namespace: {{ .Release.Namespace }}
  labels:
    {{- include "killswitch.labels" . | nindent 4 }}
    {{- with $v.podMonitor.labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  selector:
    matchLabels:
      {{- include "killswitch.selectorLabels" . | nindent 6 }}
  podMetricsEndpoints:
    - port: killswitch-ops
      path: /metrics
      {{- if eq (include "killswitch.scheme" .) "https" }}
      scheme: https
      {{- end }}
      interval: {{ $v.podMonitor.interval }}
      scrapeTimeout: {{ $v.podMonitor.scrapeTimeout }}
      {{- with $v.podMonitor.endpoint }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
{{- end }}
{{- end }}
