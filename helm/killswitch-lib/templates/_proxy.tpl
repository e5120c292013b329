{{/* "true" where a proxy stands between the bot and its venue. */}}
{{- define "killswitch.hasProxy" -}}
{{- if ne .Values.killswitch.proxy.kind "none" -}}true{{- end -}}
{{- end }}

{{/* Refuses a proxy that could not run. */}}
{{- define "killswitch.checkProxy" -}}
{{- $v := .Values.killswitch -}}
{{- if include "killswitch.hasProxy" . -}}
{{- range $key := list "image" "configMap" -}}
{{- if not (index $v.proxy $key) -}}
{{- fail (printf "killswitch: killswitch.proxy.%s is empty; a proxy of kind %s needs it, see docs/ENFORCEMENT.md" $key $v.proxy.kind) -}}
{{- end -}}
{{- end -}}
{{- if has (dig "gate" "listen" "" $v.config | toString | lower) (list "off" "false" "no") -}}
{{- fail "killswitch: killswitch.proxy asks the gate on 127.0.0.1:9780; leave killswitch.config.gate.listen as it is" -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/*
The proxy as one item of a list of containers. Arguments: the root, and where it stands ("native" or "container").

It has no probes: it listens on loopback, where the kubelet cannot reach it, and a proxy that is down lets nothing through.
It mounts nothing of the sidecar: it asks over the pod's loopback.
*/}}
{{- define "killswitch.proxy" -}}
{{- $root := index . 0 -}}
{{- $placement := index . 1 -}}
{{- $proxy := $root.Values.killswitch.proxy -}}
- name: killswitch-proxy
  image: {{ $proxy.image | quote }}
  imagePullPolicy: {{ $root.Values.killswitch.image.pullPolicy }}
  {{- if eq $proxy.kind "envoy" }}
  # Without a hot restart: its abstract socket would collide with another Envoy of the pod, Istio's.
  command: [envoy, -c, /etc/killswitch-proxy/envoy.yaml, --disable-hot-restart]
  {{- else }}
  command: [nginx, -c, /etc/killswitch-proxy/nginx.conf, -e, stderr, -g, daemon off;]
  {{- end }}
  {{- if eq $placement "native" }}
  restartPolicy: Always
  {{- else }}
  # All containers get SIGTERM at once: the bot must still be able to cancel and to flatten.
  lifecycle:
    preStop:
      exec: {command: [sleep, {{ int $root.Values.killswitch.lingerSeconds | quote }}]}
  {{- end }}
  resources:
    {{- toYaml $proxy.resources | nindent 4 }}
  securityContext:
    allowPrivilegeEscalation: false
    capabilities: {drop: [ALL]}
    readOnlyRootFilesystem: true
    runAsNonRoot: true
    {{- with $proxy.runAsUser }}
    runAsUser: {{ int64 . }}
    {{- end }}
    seccompProfile: {type: RuntimeDefault}
  volumeMounts:
    - {name: killswitch-proxy-config, mountPath: /etc/killswitch-proxy, readOnly: true}
    - {name: killswitch-proxy-tmp, mountPath: /tmp}
{{- end }}

{{/* For a list `volumes`. */}}
{{- define "killswitch.proxyVolumes" -}}
- name: killswitch-proxy-config
  configMap: {name: {{ .Values.killswitch.proxy.configMap }}}
- name: killswitch-proxy-tmp
  emptyDir: {sizeLimit: 64Mi}
{{- end }}
